"""What can be built: specs of Vision Transformers, their components, exact costs and torch modules."""
