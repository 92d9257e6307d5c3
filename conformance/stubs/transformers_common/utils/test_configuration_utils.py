"""Stands in for a file that the source distribution lacks: fields of every configuration, with values not default."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "no"},
    "label2id": {"no": 0},
    "problem_type": "regression",
    "name_or_path": "some/model",
}
