"""The fixed text of a model card: the algorithm, the example task, the citations.

Constants only; `write` and `sections` put them together with what a run measured.
"""

from greenloop.types import Task

EQUATIONS = """\
R_i   = r_i - beta * sum_t [ log pi(y_it | x, y_i<t) - log pi_ref(y_it | x, y_i<t) ]
A_i   = R_i - 1/(K-1) * sum_{j != i} R_j
rho_i = exp( sum_t [ log pi_theta(y_it | x, y_i<t) - log pi_behaviour(y_it | x, y_i<t) ] )
L     = - mean_i min( rho_i * A_i, clip(rho_i, 1 - epsilon, 1 + epsilon_high) * A_i )"""
"""Reward with the KL penalty, leave-one-out advantage, sequence ratio, clipped loss."""

EXAMPLE = Task(
    task_id="card/count_vowels",
    statement="Write a function to count the vowels in a word.",
    entry_point="count_vowels",
    tests=(
        "assert count_vowels('sandbox') == 2",
        "assert count_vowels('rhythm') == 0",
        "assert count_vowels('Aeon') == 3",
    ),
)
"""What the quick start asks."""

CITATIONS = r"""@misc{ahmadian2024back,
  title         = {Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs},
  author        = {Arash Ahmadian and Chris Cremer and Matthias Gall{\'e} and Marzieh Fadaee and Julia Kreutzer and
                   Olivier Pietquin and Ahmet {\"U}st{\"u}n and Sara Hooker},
  year          = {2024},
  eprint        = {2402.14740},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}

@misc{austin2021program,
  title         = {Program Synthesis with Large Language Models},
  author        = {Jacob Austin and Augustus Odena and Maxwell Nye and Maarten Bosma and Henryk Michalewski and
                   David Dohan and Ellen Jiang and Carrie Cai and Michael Terry and Quoc Le and Charles Sutton},
  year          = {2021},
  eprint        = {2108.07732},
  archivePrefix = {arXiv},
  primaryClass  = {cs.PL}
}

@misc{hu2021lora,
  title         = {LoRA: Low-Rank Adaptation of Large Language Models},
  author        = {Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and
                   Shean Wang and Lu Wang and Weizhu Chen},
  year          = {2021},
  eprint        = {2106.09685},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}

@misc{peft,
  title         = {PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author        = {Sourab Mangrulkar and Sylvain Gugger and Lysandre Debut and Younes Belkada and Sayak Paul and
                   Benjamin Bossan},
  howpublished  = {\url{https://github.com/huggingface/peft}},
  year          = {2022}
}"""
"""BibTeX of RLOO, MBPP, LoRA and PEFT."""

CHAT_QUICK_START = '''\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = {adapter}
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoPeftModelForCausalLM.from_pretrained(adapter)

fence = "`" * 3
question = f"""{question}"""
messages = [
    {{"role": "system", "content": {system}}},
    {{"role": "user", "content": question}},
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'''

PLAIN_QUICK_START = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = {adapter}
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoPeftModelForCausalLM.from_pretrained(adapter)

inputs = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

PUBLIC_TASKS = (
    "MBPP and HumanEval have been public since 2021. The base model may have read their tasks and solutions, so these "
    "scores may say less about new tasks than their intervals suggest."
)
MBPP_PLUS = (
    "MBPP+ draws its 378 tasks from all splits of MBPP, those trained on here included: measure this adapter on those "
    "MBPP+ tasks only whose ids are in MBPP's test split (11-510)."
)
STARTER_TASKS = (
    "The starter tasks were written for greenloop, in the style of MBPP; train and test are separate splits by the "
    "same authors, so the scores are about tasks of this kind and level."
)
ONE_RUN = (
    "This is one run with one seed. The intervals are over tasks; they do not cover what another seed would have given."
)
PROGRAMS = "The model writes programs that may be wrong or harmful: run them in a sandbox, and read them before use."
