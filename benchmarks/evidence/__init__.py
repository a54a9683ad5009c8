"""Controlled experiments, in the order things happen: images, cells, running, rows, page."""
