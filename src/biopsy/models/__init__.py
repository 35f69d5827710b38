"""Learning: from a recipe and a pack to a classifier.

``recipes/`` (what to do) and ``networks/`` (with what) grow by one file each. ``preprocessing``,
``augmentation`` and ``batches`` bring pixels to the network; ``engine`` and ``optimisers`` do the arithmetic;
``fitting`` is the loop over epochs, ``checkpoints`` its memory; ``training`` makes a `Run` out of them and
``completion`` what the run leaves behind. ``inference`` and ``ood_score`` ask a finished `Classifier`;
``runtimes`` and ``compiling`` ask it about whole slides, with ``hardware`` saying on what.
May use statistics, figures, imaging and data; nothing here looks at a test side.
"""
