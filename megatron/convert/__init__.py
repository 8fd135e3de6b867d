"""Models and data that travel: published checkpoints, Hugging Face folders and the hub.

``unpickle`` reads pickled checkpoints without running their code, ``published`` the DeepSpeed-pipeline layout of the
published models, ``huggingface`` writes and reads folders of ``transformers``, ``hub`` downloads and uploads. All of
them meet in one form: a dict of full canonical tensors (``canonical``) and a :class:`megatron.config.schema.Config`.
"""
