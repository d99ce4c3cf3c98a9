"""The driver's networks without batch statistics; as a script, the driver's command line with them."""

import sys

from torch import nn

from gkd_fast.train import build, cli


def without_batch_norm(built):
    """A function that builds networks, with group norm in the place of their batch norm."""

    def build_network(*arguments, **settings):
        network = built(*arguments, **settings)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(2, child.num_features))
        return network

    return build_network


if __name__ == "__main__":
    build.build_network = without_batch_norm(build.build_network)
    sys.exit(cli.main())
