"""Forms in which a bundle holds its network, a file each."""
