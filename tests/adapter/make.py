"""Makes the adapter of this folder with peft, and the weights' change that peft's own merge of it gives.

    pip install peft==0.21.2; python tests/adapter/make.py

It fits the tests' Llama trio (builders.py): q_proj and down_proj of layers 0 and 2, of ranks 4, 3 and 2, rsLoRA, B
drawn at random in place of training. delta.safetensors: what merge_and_unload adds, formed in float64, stored in fp32.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))


def main() -> None:
    from builders import make_model

    model = make_model("llama")
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
        rank_pattern={"layers.2.mlp.down_proj": 2, r"^model\.layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"mlp.down_proj": 5}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(HERE)
    (HERE / "README.md").unlink()
    after = adapted.double().merge_and_unload().state_dict()
    deltas = {name: (tensor - before[name]).float() for name, tensor in after.items()}
    save_file({name: delta for name, delta in deltas.items() if delta.any()}, HERE / "delta.safetensors")


if __name__ == "__main__":
    main()
