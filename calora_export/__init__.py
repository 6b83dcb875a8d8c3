"""Exports a trained CA-LoRA bundle to a phone: base stored once, adapters swapped, mixed and routed at run time.

The flow is in `calora_export.pipeline`: export(), add_adapter() and validate().
"""
