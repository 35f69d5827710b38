"""Importers of models of other libraries.

``keras_files`` reads Keras files without executing code, ``keras`` converts them to classifiers. ``wsinfer``
runs TorchScript models, which contain code, once the user trusts them.
"""
