"""Where else a run's records go as they are made: TensorBoard, Weights & Biases, MLflow, others."""
