"""The plain CNN that the README compares with: train.py with another network in place of capsules.

    python results/plain_cnn.py --dataset smallnorb --lr 6e-3 --out runs/cnn
    python results/plain_cnn.py --eval runs/cnn/weights.pt --crops 2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder
import train  # before torch: it tells threads how to wait

from torch import nn


class PlainCNN(nn.Module):
    """43,000 parameters. images (B, *image_shape) -> None in place of poses, logits (B, classes)"""

    def __init__(self, image_shape, num_classes, routing):
        super().__init__()

        def block(inputs, outputs, kernel_size, stride):
            conv = nn.Conv2d(inputs, outputs, kernel_size, stride)
            return conv, nn.BatchNorm2d(outputs), nn.ReLU()

        self.layers = nn.Sequential(
            *block(image_shape[0], 32, kernel_size=5, stride=2),
            *block(32, 48, kernel_size=3, stride=2),
            *block(48, 64, kernel_size=3, stride=1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, images):
        return None, self.layers(images)

    def parameter_groups(self, lr):
        return [{"params": self.parameters(), "lr": lr}]


if __name__ == "__main__":
    train.command_line(PlainCNN)
