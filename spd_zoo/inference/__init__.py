"""Networks applied to images: classes, boxes, files of results."""
