"""Saliency maps of patches: the methods that compute them, and maps on the pixels of the patch."""
