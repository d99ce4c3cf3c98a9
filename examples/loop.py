"""Distillation in a loop of your own: python examples/loop.py [EPOCHS]"""

import sys

import torch
from digits import STAGES, accuracy, loaders, network, trained

from gkd_fast import GraphDistiller

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
train, test = loaders()
teacher = trained(network(16), train, epochs)
student = network(4)

images, _ = next(iter(train))
distiller = GraphDistiller(student, teacher, STAGES, STAGES, num_classes=10, sample=images)
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
for epoch in range(epochs):
    distiller.train()
    for images, labels in train:
        loss, terms, logits = distiller(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: " + ", ".join(f"{name} {term.item():.3f}" for name, term in terms.items()))
print(f"teacher {accuracy(teacher, test):.1f} %, student {accuracy(student, test):.1f} %")
