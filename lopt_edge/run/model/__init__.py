"""The model as it is run: layers, adapters, vocabulary."""
