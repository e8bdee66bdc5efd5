"""TorchDynamo in front of the tracer."""
