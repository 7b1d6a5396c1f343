"""Images with boxes for detectors, from every form in which people have them, in one form in memory."""

from spd_zoo.data.boxes.images import EVERY_CLASS, BoxImages, Objects, Tiling, found_in_words, hold_out, with_names
from spd_zoo.data.boxes.opening import open_boxes

__all__ = ["EVERY_CLASS", "BoxImages", "Objects", "Tiling", "found_in_words", "hold_out", "open_boxes", "with_names"]
