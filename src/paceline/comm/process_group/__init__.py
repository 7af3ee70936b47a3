"""The backend "paceline" of torch.distributed.

From the outside in: `register` (the entry point), `connect` (makes a group), `fast_path` and `group` (the
collectives), `identity` (what a group is besides them), `arguments` (translates torch's arguments), `work`,
`completion` and `typed_future` (what a call returns), `instrumentation` and `patches` (profiles, Dynamo,
torch's own checks).
"""
