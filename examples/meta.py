"""The same with pair weights that meta-steps train: python examples/meta.py [EPOCHS]"""

import sys

import torch
from digits import STAGES, accuracy, loaders, network, trained

from gkd_fast import GraphDistiller
from gkd_fast.distiller import MetaSettings

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
train, test = loaders()
teacher = trained(network(16), train, epochs)
student = network(4)

images, _ = next(iter(train))
meta = MetaSettings(inner_lr=0.05, lr=0.5)
distiller = GraphDistiller(student, teacher, STAGES, STAGES, num_classes=10, sample=images, meta=meta)
# The pair weights are none of the optimizer's business: they ask for no gradient outside of meta_step.
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
step = 0
for epoch in range(epochs):
    distiller.train()
    for images, labels in train:
        distiller(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            norm = distiller.meta_step(images, labels)["meta_gradient_norm"]
        step += 1
    report = distiller.diagnostics(images)
    print(f"epoch {epoch}: pair weights {report['weight_mean']:.3f} ± {report['weight_std']:.3f}, gradient {norm:.1e}")
torch.save([distiller.state_dict(), optimizer.state_dict(), distiller.meta_optimizer.state_dict()], "meta.pt")
print(f"teacher {accuracy(teacher, test):.1f} %, student {accuracy(student, test):.1f} %")
