"""The table of adversarial programs: what each tries, and what must come of it.

A check reads R (return code), S (outcome), O and E (stdout, stderr), NO and NE (bytes written),
T (seconds), D (detail), LEVEL, LIMIT (seconds), SHARED (whether the guest has the user of other
processes, which RLIMIT_NPROC counts too). Limits of the runs: harness.LIMITS. @PORT@, @UNIX@,
@HOSTFILE@ and @MARK@ are filled in by the harness: a TCP service, a UNIX socket, a file and a
secret of the host.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: `check` is a Python expression that must be true at every level named."""

    name: str
    code: str
    check: str
    stdin: bytes = b""
    levels: tuple = ("L3", "L2", "L1")

    def holds(self, result, level, is_shared, seen):
        """Whether the check is true of a result; `seen` carries values from case to case."""
        names = dict(R=result["return_code"], S=result["outcome"], O=result["stdout"])
        names |= dict(E=result["stderr"], NO=result["stdout_bytes"], NE=result["stderr_bytes"])
        names |= dict(T=result["duration_s"], D=result["detail"], LEVEL=level, SEEN=seen)
        names |= dict(SHARED=is_shared, LIMIT=result["timeout_s"] or 2.0)
        return bool(eval(self.check, names))


def _denied(name, statement, also="", levels=("L3", "L2", "L1")):
    """A statement that must raise OSError or ValueError."""
    code = (
        f"import os, socket\ntry:\n  {statement}\n  print('DONE')\n"
        "except (OSError, ValueError) as e: print('denied', getattr(e, 'errno', 0))"
    )
    return Case(name, code, "R==0 and O.startswith('denied') " + also, levels=levels)


LIBC = "import ctypes\nl=ctypes.CDLL(None,use_errno=True)\n"
ENDED = "S in ('ok','user_error','timeout','memory','output_limit') and T<LIMIT+2"
TIMED_OUT = "S=='timeout' and T<LIMIT+2"

RESOURCES = [
    Case("fork_bomb", "import os\nwhile 1: os.fork()", ENDED + " and S!='ok'"),
    Case(
        "fork_limit",
        "import os\nn=0\ntry:\n  for i in range(200):\n    if os.fork()==0:\n"
        "      import time; time.sleep(30)\n    n+=1\n"
        "except BlockingIOError as e: print('limited',n<=20,e.errno,flush=True)\nos._exit(0)",
        "'limited True 11' in O or (SHARED and 'limited' in O) or 'too many proc' in D",
    ),
    Case(
        "thread_bomb",
        "import threading,time\nn=0\ntry:\n  for i in range(5000):\n"
        "    threading.Thread(target=time.sleep,args=(9,),daemon=True).start(); n+=1\n"
        "except RuntimeError as e: print('limited',n<64,flush=True)\nimport os; os._exit(0)",
        "'limited True' in O",
    ),
    Case("mem_bomb", "x=[]\nwhile 1: x.append(bytearray(10**7))", "R==1 and S=='memory'"),
    Case("mem_one_block", "x=bytearray(10**12)", "R==1 and S=='memory' and 'MemoryError' in E"),
    Case(
        "mem_bomb_caught",
        "x=[]\ntry:\n  while 1: x.append(bytearray(10**7))\n"
        "except MemoryError: n=len(x); del x; print('caught',n<60)",
        "'caught True' in O and R==0 and S=='ok'",
    ),
    Case(
        "mem_fork_mult",
        "import os,time\nfor i in range(8):\n  if os.fork()==0:\n    x=bytearray(150<<20)\n"
        "    x[::4096]=b'1'*len(x[::4096]); time.sleep(9); os._exit(0)\n"
        "print('spawned',flush=True); time.sleep(9)",
        "S in ('memory','timeout') and 'spawned' in O",
    ),
    Case(
        "mem_mmap_shared",
        "import mmap\nm=[]\nwhile 1:\n  m.append(mmap.mmap(-1,1<<24)); m[-1].write(b'x'*(1<<24))",
        "R==1 and S in ('user_error','memory')",
    ),
    Case(
        "memfd_refused",
        "import os\ntry: os.memfd_create('x'); print('MADE')\nexcept OSError as e: print(e.errno)",
        "O=='38\\n'",
    ),
    Case("disk_fill", "f=open('big','wb')\nwhile 1: f.write(b'x'*(1<<20))", "S=='user_error'"),
    Case(
        "disk_sparse",
        "f=open('s','wb')\ntry: f.truncate(1<<40); print('GREW')\n"
        "except OSError as e: print(e.errno)",
        "O=='27\\n'",
    ),
    Case(
        "disk_fill_many",
        "i=0\ntry:\n  while 1:\n    open(f'f{i}','wb').write(b'x'*(1<<20)); i+=1\n"
        "except OSError as e: print('stopped',i<40,e.errno)",
        "'stopped True 28' in O if LEVEL=='L3' else S in ('user_error','timeout')",
    ),
    Case(
        "inode_fill",
        "i=0\ntry:\n  while 1: open(f'f{i}','w').close(); i+=1\n"
        "except OSError as e: print('stopped',i<5000,e.errno)",
        "'stopped True 28' in O if LEVEL=='L3' else S in ('user_error','timeout')",
    ),
    Case(
        "deep_directories",
        "import os\nfor i in range(400): os.mkdir('d'); os.chdir('d')\n"
        "os.chmod('.',0); print('deep')",
        "'deep' in O or 'PermissionError' in E",
    ),
    Case(
        "shm_fill",
        "try:\n  f=open('/dev/shm/x','wb')\n  while 1: f.write(b'x'*(1<<20))\n"
        "except OSError as e: print('stopped',e.errno)",
        "'stopped' in O",
        levels=("L3", "L2"),
    ),
    Case(
        "fd_leak",
        "fs=[]\ntry:\n  while 1: fs.append(open('/dev/null'))\n"
        "except OSError as e: print('EMFILE',e.errno)",
        "'EMFILE 24' in O",
    ),
    Case(
        "infinite_output",
        "while 1: print('abcdefghij'*100)",
        "S=='output_limit' and len(O)<=65536",
    ),
    Case(
        "infinite_stderr",
        "import sys\nwhile 1: sys.stderr.write('e'*9999)",
        "S=='output_limit' and len(E)<=65536",
    ),
    Case("big_output_200k", "print('x'*200000)", "R==0 and NO==200001 and len(O)==65536"),
    Case("big_output_1M", "print('x'*1000000)", "R==0 and S=='ok' and NO==1000001"),
    Case("big_output_10M", "print('x'*10**7)", "S=='output_limit' and T<2.5"),
    Case(
        "both_streams_interleaved",
        "import sys\nfor i in range(20000): print(i); print(i,file=sys.stderr)",
        "S=='ok' and R==0 and NO>100000 and NE>100000",
    ),
    Case(
        "many_short_children",
        "import os\nfor i in range(60):\n  if os.fork()==0: os._exit(0)\n  os.wait()\n"
        "print('fine')",
        "O=='fine\\n' and R==0",
    ),
    Case(
        "many_orphans",
        "import os,time\nfor i in range(60):\n  if os.fork()==0:\n"
        "    if os.fork()==0: os._exit(0)\n    os._exit(0)\n  os.wait(); time.sleep(.004)\n"
        "print('fine')",
        "O=='fine\\n' and R==0",
    ),
]

TIME = [
    Case("sleep_forever", "import time; time.sleep(10**6)", TIMED_OUT + " and R is None"),
    Case("busy_loop", "while True: pass", TIMED_OUT),
    Case(
        "ignore_signals",
        "import signal,time\nfor s in range(1,32):\n  try: signal.signal(s,signal.SIG_IGN)\n"
        "  except OSError: pass\nwhile 1: time.sleep(1)",
        TIMED_OUT,
    ),
    Case("c_level_hang", "import re; re.match(r'(a+)+$','a'*40+'b')", TIMED_OUT),
    Case("bignum_hang", "x=9**9**9", ENDED + " and S!='ok'"),
    Case(
        "partial_output",
        "import time; print('partial',flush=True); time.sleep(99)",
        TIMED_OUT + " and O=='partial\\n'",
    ),
    Case("stdin_at_end", "print(repr(input()))", "R==1 and 'EOFError' in E"),
    Case("deadlock", "import threading\nk=threading.Lock()\nk.acquire(); k.acquire()", TIMED_OUT),
    Case(
        "thread_outlives_main",
        "import threading,time\nthreading.Thread(target=time.sleep,args=(99,)).start(); print(1)",
        TIMED_OUT + " and O=='1\\n'",
    ),
    Case(
        "atexit_hang",
        "import atexit,time; atexit.register(time.sleep,60); print('x',flush=True)",
        TIMED_OUT + " and 'x' in O",
    ),
    Case(
        "del_hang",
        "import time\nclass A:\n  def __del__(s): time.sleep(60)\na=A()\nprint('x',flush=True)",
        TIMED_OUT + " and 'x' in O",
    ),
    Case(
        "alarm_ends_it",
        "import signal,time\nsignal.setitimer(0,.2); time.sleep(9)",
        "R==-14 and T<3",
    ),
]
