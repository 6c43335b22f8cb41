"""From images, labels and texts as people have them to tensors."""
