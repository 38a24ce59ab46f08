"""What nobody needs to read to understand the method, one concept a file.

files           reading what a stranger may have made, or refusing it in a sentence
outputs         writing in one piece, locks, outputs found out before the work
folders         Hugging Face folders, in and out;  fingerprint: what tells bases apart
tokenizer       text to token ids and back
adapter_files   one adapter as a file;  targets: the layers that --targets names
registry        what extras/ holds, by name
flags           flags that scripts share, run_main;  generate_flags, training_flags, bench_flags
provenance      digests, what differs, the machine, the command
texts           from files to training texts
runs            one run of a training;  checkpoints, processes
requests        what one request must be;  prompts: prompts in, text out
workload        the requests that bench.py serves;  timing: seconds, and a device's limits
report          what a training tells;  figures: what bench.py prints and draws
names           what a reader calls a method, a language, a model

It imports nothing from the core or from extras/. Its tests stand in plumbing/tests/.
"""
