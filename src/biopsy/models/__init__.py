"""Classifiers: networks, weights, preprocessing, inference, runtimes, importers, reference of training."""
