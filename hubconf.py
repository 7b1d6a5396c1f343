"""Every network for `torch.hub`: `torch.hub.load("OWNER/spd_zoo", "tf_efficientnet_lite0_spd", pretrained=True)`."""

from timm import is_model as _is_model

from spd_zoo import models as _models

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

globals().update({name: value for name, value in vars(_models).items() if _is_model(name)})
