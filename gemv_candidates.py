"""Check and time the candidates of lut_candidate.py: python gemv_candidates.py SMS"""
import statistics, sys, time
sys.path.insert(0, "tests/benchmarks")
import torch, bitsandbytes.functional as F
from bench_training import confine, turn
sms = int(sys.argv[1])
context = confine({"sms": sms, "cap": 0})
if context: context.set_context()
n_sm = sms or torch.cuda.get_device_properties(0).multi_processor_count
from lut_candidate import lut_kernel, LEVEL_SCALE
which = sys.argv[3]
SHAPES = {"3B gate_up": (22016, 2048), "3B down": (2048, 11008), "8B gate_up": (28672, 4096), "8B down": (4096, 14336)}
#        W  WK  TWO AHEAD regs resident RAW S
CASES = [(8, 8, 1, 0, 128, 2, 0, 1), (8, 8, 1, 1, 128, 2, 0, 1), (8, 8, 1, 0, 128, 2, 0, 0), (8, 4, 1, 0, 128, 2, 0, 1), (8, 4, 1, 1, 128, 2, 0, 1),
         (8, 8, 0, 0, 80, 3, 0, 1), (8, 8, 0, 0, 64, 4, 0, 1), (8, 8, 0, 1, 80, 3, 0, 1), (8, 4, 0, 0, 80, 3, 0, 1), (8, 2, 0, 0, 64, 4, 0, 1),
         (16, 8, 0, 0, 80, 1, 0, 1), (16, 8, 0, 0, 64, 2, 0, 1), (16, 16, 1, 0, 128, 1, 0, 1), (16, 8, 1, 0, 128, 1, 0, 1),
         (8, 8, 1, 0, 128, 2, 1, 1), (8, 8, 0, 0, 64, 4, 1, 1), (8, 8, 0, 0, 64, 4, 0, 2), (8, 8, 0, 0, 64, 4, 1, 2)]
def launch(m, case, x, out, LOOP, grid):
    W, WK, TWO, AHEAD, regs, resident, RAW, S = case
    lut_kernel[(grid,)](x, m["codes"], m["absmax"], m["second"], m["code2"], m["offset"], m["lut"], out, m["rows"], K=m["K"],
        W=W, WK=WK, LOOP=LOOP, TWO=bool(TWO), AHEAD=bool(AHEAD), RAWX=bool(RAW), S=S, num_warps=W, num_stages=1, maxnreg=regs)
def small(rows, K):
    z = lambda n, d: torch.zeros(n, dtype=d, device="cuda")
    return dict(codes=z(32 * K, torch.int32), absmax=z(32 * K, torch.uint8), second=z(K, torch.float32), code2=z(256, torch.float32), offset=z(1, torch.float32), lut=z(16, torch.float32), rows=32, K=K)
import contextlib
with contextlib.ExitStack() as stack:
    alone = stack.enter_context(turn({"turn": sys.argv[2]}))
    start = time.time()
    for name, (rows, K) in SHAPES.items():
        if not name.startswith(which): continue
        for case in CASES:
            try:
                launch(small(rows, K), case, torch.zeros(K + 64, dtype=torch.bfloat16, device="cuda"), torch.zeros(4096, device="cuda"), 1, 1)
                torch.cuda.synchronize()
            except Exception as e:
                print(name, case, "FAILED", repr(e)[:200], flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    alone_now = alone
    alone_now()
    held = stack.pop_all()
for name, (rows, K) in SHAPES.items():
    if not name.startswith(which): continue
    torch.manual_seed(0)
    matrices = []
    copies = max(2, int(240e6 // (rows * K / 2)))
    for i in range(copies):
        weight = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) / K**0.5
        packed, state = F.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        matrices.append(dict(codes=packed.flatten().view(torch.int32), absmax=state.absmax, second=state.state2.absmax, code2=state.state2.code,
                             offset=state.offset.reshape(1).float(), lut=state.code * LEVEL_SCALE, rows=rows, K=K, packed=packed, state=state))
        # the scale of the levels is taken out of the constants
        matrices[-1]["second"] = matrices[-1]["second"] / LEVEL_SCALE
        matrices[-1]["offset"] = matrices[-1]["offset"] / LEVEL_SCALE
    x = torch.zeros(K + 64, device="cuda", dtype=torch.bfloat16); x[:K] = torch.randn(K, device="cuda", dtype=torch.bfloat16)
    st = matrices[0]["state"]
    absmax = F.dequantize_blockwise(st.absmax, st.state2).float() + st.offset.float()
    codes = matrices[0]["packed"].flatten()
    lv = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
    exact = (st.code.double()[lv].view(-1, 64) * absmax.double()[:, None]).view(rows, K)
    want = exact @ x[:K].double()
    own = (exact.bfloat16().double() @ x[:K].double()); own_error = ((own - want).norm() / want.norm()).item()
    del exact
    line, worst, number = [], 0.0, -1
    for case in CASES:
        number += 1
        W, WK, TWO, AHEAD, regs, resident, RAW, S = case
        if WK * 256 > K + 255 and WK > 8 or (case, name) == 0: continue
        tiles = -(-(rows // 2 if TWO else rows) // (16 * (W // WK)))
        LOOP = max(1, -(-tiles // (n_sm * resident)))
        grid = -(-tiles // LOOP)
        out = torch.full((rows + 64,), float("nan"), device="cuda")
        try:
            launch(matrices[0], case, x, out, LOOP, grid)
            torch.cuda.synchronize()
            error = ((out[:rows].double() - want).norm() / want.norm()).item()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for m in matrices: launch(m, case, x, out, LOOP, grid)
            times = []
            for _ in range(5):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                graph.replay(); a.record(); graph.replay(); graph.replay(); b.record(); torch.cuda.synchronize()
                times.append(a.elapsed_time(b) * 500 / copies)
            us = statistics.median(times)
            size = rows * K * (0.5 + 1 / 64)
            bad = "" if RAW or S == 2 or error < own_error else f"!{error:.1e}"
            line.append(f"{number}:{us:.1f}{bad}")
            if not RAW and S != 2: worst = max(worst, error) if error == error else float("nan")
        except Exception as e:
            print(name, case, "FAILED", repr(e)[:300], flush=True)
            if "CUDA" in repr(e) and "illegal" in repr(e): sys.exit(1)
    size = rows * K * (0.5 + 1 / 64)
    print(f"{name} @{n_sm} {size / 1e6:.1f} MB err {worst:.1e} (bf16 {own_error:.1e}) us " + " ".join(line), flush=True)
