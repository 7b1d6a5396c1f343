"""The networks, one module per family; importing this package registers them with timm."""

from spd_zoo.models.pyconvresnet import *
from spd_zoo.models.resnet_spd import *
