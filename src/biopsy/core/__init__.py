"""What every other part rests on: errors, files written whole or not at all, seeds."""
