"""Continual learning of image classifiers on pretrained backbones."""
