"""The only room that imports torch's FSDP."""
