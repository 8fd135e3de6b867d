"""Models that travel: published checkpoints and Hugging Face folders.

``unpickle`` reads pickled checkpoints without running their code, ``published`` the DeepSpeed-pipeline layout of the
published models, ``hf_folder`` writes and reads folders of ``transformers``. All of them meet in one form: a dict of full
canonical tensors (:mod:`megatron.checkpoint.tensors`) and a :class:`megatron.config.schema.Config`.
"""
