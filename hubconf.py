"""Every network for `torch.hub`: `torch.hub.load("OWNER/spd_zoo", "tf_efficientnet_lite0_spd", pretrained=True)`."""

from timm import list_models as _list_models

from spd_zoo import models as _models

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

globals().update({name: value for name, value in vars(_models).items() if name in set(_list_models())})
