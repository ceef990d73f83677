"""Is a fine-tuned classifier robust? Measurements for any `transformers` classifier or `PeftModel`, ROSE or not."""
