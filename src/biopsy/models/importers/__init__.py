"""Models of other libraries, read as data: nothing of Keras's that came with them is executed.

``keras_files`` reads what Keras wrote, ``keras`` carries the weights into a network of ours and makes a
classifier of it. ``wsinfer`` runs TorchScript, which is code, once it is trusted.
"""
