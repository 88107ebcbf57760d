"""What people see of a run: metrics.jsonl, W&B, TensorBoard, Trackio, SwanLab, the progress bar and the pictures.

`megatron_lora.metrics.RunReporter` puts the parts together; trainers need nothing else.
"""
