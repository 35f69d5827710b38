"""Explanation: saliency and other maps, their faithfulness tests, and the report's sections on them."""
