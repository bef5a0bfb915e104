"""The gradient engine: every sample's gradient, reduced without being formed where it can be."""
