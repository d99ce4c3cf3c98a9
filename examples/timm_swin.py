"""A Swin transformer of timm teaches a small convolutional network: python examples/timm_swin.py [STEPS]

The images are noise, so that nothing is downloaded; put your own loader in their place, and pretrained=True.
"""

import sys

import timm
import torch

from gkd_fast import GraphDistiller

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
torch.manual_seed(0)
options = {"pretrained": False, "num_classes": 10}
teacher = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **options)
student = timm.create_model("mobilenetv3_small_050", **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, 3, 64, 64), torch.randint(10, (16,))


distiller = GraphDistiller(
    student,
    teacher,
    student_stages=["blocks.1", "blocks.3", "blocks.5"],
    teacher_stages=["layers.1", "layers.2", "layers.3"],  # [B, H, W, C], which the sample tells
    num_classes=10,
    sample=batch()[0],
    pairs="matched",
)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, weight_decay=0.05)
for step in range(steps):
    loss, terms, logits = distiller(*batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
