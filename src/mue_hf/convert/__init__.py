"""OFA's published weights, in both layouts, to checkpoints of this package."""
