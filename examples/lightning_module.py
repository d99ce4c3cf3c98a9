"""Distillation with Lightning, which logs, saves and resumes: python examples/lightning_module.py [EPOCHS]"""

import sys

import lightning
import torch
from digits import STAGES, loaders, network, trained

from gkd_fast import GraphDistiller
from gkd_fast.integrations.lightning import DistillationModule

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
lightning.seed_everything(0)
train, test = loaders()
teacher = trained(network(16), train, epochs)
images, _ = next(iter(train))
distiller = GraphDistiller(network(4), teacher, STAGES, STAGES, num_classes=10, sample=images, meta=True)
module = DistillationModule(distiller, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4))
trainer = lightning.Trainer(max_epochs=epochs, accelerator="auto", log_every_n_steps=10)
trainer.fit(module, train, test)
print({name: round(float(x), 3) for name, x in trainer.callback_metrics.items()})
