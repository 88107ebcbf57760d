"""What people see of a run: metrics.jsonl, trackers (W&B, TensorBoard, Trackio, SwanLab, MLflow), the bar, pictures.

`megatron_lora.metrics.RunReporter` puts the parts together; trainers need nothing else.
"""
