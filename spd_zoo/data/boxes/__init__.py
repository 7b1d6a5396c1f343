"""Reads images with boxes for detectors from all common annotation formats."""

from spd_zoo.data.boxes.images import EVERY_CLASS, BoxImages, Objects, Tiling, found_in_words, hold_out, with_names
from spd_zoo.data.boxes.opening import open_boxes

__all__ = ["EVERY_CLASS", "BoxImages", "Objects", "Tiling", "found_in_words", "hold_out", "open_boxes", "with_names"]
