"""Captions of images by an image-to-text model, and captions rewritten by a language model."""
