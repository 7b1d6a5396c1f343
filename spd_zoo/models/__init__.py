"""The networks, one module per family; importing this package registers them with timm."""

from spd_zoo.models.bsconv_mobilenetv3 import *
from spd_zoo.models.bsconv_resnet import *
from spd_zoo.models.efficientnet_lite_spd import *
from spd_zoo.models.pfd_ghostnet import *
from spd_zoo.models.pfd_mobilenetv3 import *
from spd_zoo.models.pfd_parc_mobilenetv2 import *
from spd_zoo.models.pfd_shufflenetv2 import *
from spd_zoo.models.pyconvresnet import *
from spd_zoo.models.resnet_spd import *
from spd_zoo.models.ssd_small import *
from spd_zoo.models.yolov5_spd import *
from spd_zoo.models.yolov8_p2 import *
from spd_zoo.models.yolov8_spd import *
