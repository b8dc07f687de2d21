"""What the fast path knows about the families of models, by the names of transformers' classes."""

# Modules that read the same x share a mask, so that one pass over x can serve all of them.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}
# Layers whose norms have attention and the MLP as their only readers, and their norms.
LAYERS = {"Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer"}
NORMS = {"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm"}
# Attention classes whose forward is that of layers._fused_attention; what is not here keeps its own.
ATTENTIONS = {"Qwen2Attention", "Qwen3Attention", "LlamaAttention", "MistralAttention"}
MODELS = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"}
