"""Adapters made of adapters: weighted sums of several, thin products from any change of weights, values exchanged."""
