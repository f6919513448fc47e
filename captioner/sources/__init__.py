"""Sources of images and captions, opened by name, path or URI with ``open_source``."""
