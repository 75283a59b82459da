"""Programs that attack processes, the network, files and privileges; see cases.py."""

from .cases import ENDED, LIBC, TIMED_OUT, Case, _denied

PROCESSES = [
    Case(
        "child_outlives",
        "import subprocess as s,sys; s.Popen([sys.executable,'-c','import time;time.sleep(60)'])"
        "; print('done',flush=True)",
        "S=='ok' and 'done' in O",
    ),
    Case(
        "setsid_daemon",
        "import os,time\nif os.fork()==0:\n  os.setsid()\n  if os.fork()==0:\n"
        "    for f in (0,1,2): os.close(f)\n    time.sleep(60)\n  os._exit(0)\n"
        "print('done',flush=True)",
        "S=='ok' and 'done' in O",
    ),
    Case(
        "child_finishes_output",
        "import os,time\nif os.fork()==0:\n  time.sleep(.05); print('child'); raise SystemExit\n"
        "print('main')",
        "S=='ok' and sorted(O.split())==['child','main']",
    ),
    Case("kill_minus1", "import os\nos.kill(-1,9)\nprint('alive')", ENDED),
    Case("kill_own_group", "import os\nos.kill(0,9)\nprint('alive')", "R==-9 and S=='user_error'"),
    Case(
        "kill_parent",
        "import os\nfor s in (9,15,19,2):\n  try: os.kill(os.getppid(),s); print('sent')\n"
        "  except OSError as e: print('denied',e.errno)\nprint('end')",
        "S in ('ok',) and O.endswith('end\\n') and T<2.5",
    ),
    Case("stop_self", "import os,signal; os.kill(os.getpid(),signal.SIGSTOP)", TIMED_OUT),
    Case(
        "exec_replace",
        "import os; os.execv('/bin/sh',['sh','-c','echo hi; exit 3'])",
        "R==3 and 'hi' in O",
    ),
    Case(
        "stdin_is_read_only",
        "import os\ntry: os.pwrite(0,b'x',0); print('WROTE')\nexcept OSError as e: print(e.errno)",
        "O=='1\\n'",
        stdin=b"abc",
    ),
    Case("os_exit_code", "import os; os._exit(77)", "R==77 and S=='user_error'"),
    Case(
        "exit_0_early", "import os; print('kept'); os._exit(0)", "R==0 and S=='ok' and O=='kept\\n'"
    ),
    Case("sys_exit_str", "import sys; sys.exit('bye')", "R==1 and E=='bye\\n'"),
    Case("sys_exit_none", "import sys; sys.exit()", "R==0 and S=='ok'"),
    Case("sys_exit_300", "import sys; sys.exit(300)", "R==44"),
    Case("abort", "import os; os.abort()", "R==-6 and S=='user_error'"),
    Case("segv_ctypes", "import ctypes; ctypes.string_at(0)", "R==-11 and S=='user_error'"),
    Case("kill_self_is_its_own", "import os; os.kill(os.getpid(),9)", "R==-9 and S=='user_error'"),
    Case("deep_recursion", "def f(n): return f(n+1)\nf(0)", "R==1 and 'RecursionError' in E"),
    Case(
        "recursion_limit_raised",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n+1)\nf(0)",
        ENDED + " and S!='ok'",
    ),
    Case(
        "affinity_of_others",
        "import os\ntry: os.sched_setaffinity(os.getppid(),{0}); print('set')\n"
        "except OSError as e: print('denied',e.errno)",
        "O=='denied 1\\n'",
    ),
    Case(
        "keep_alive_after_parent",
        LIBC + "print(l.prctl(1,0,0,0,0), ctypes.get_errno())",
        "O=='-1 1\\n'",
    ),
]

NETWORK = [
    _denied("net_tcp", "socket.create_connection(('127.0.0.1',int('@PORT@')),2)", "and T<2"),
    _denied("net_dns", "socket.gethostbyname('example.com')", "and T<2.9"),
    _denied("net_udp", "socket.socket(socket.AF_INET,socket.SOCK_DGRAM)"),
    _denied("net_ipv6", "socket.socket(socket.AF_INET6)"),
    _denied("net_raw", "socket.socket(socket.AF_PACKET,socket.SOCK_RAW,3)"),
    _denied("net_netlink", "socket.socket(socket.AF_NETLINK,socket.SOCK_RAW,0)"),
    _denied("net_listen", "socket.create_server(('127.0.0.1',0))"),
    _denied("unix_socket_host", "socket.socket(socket.AF_UNIX).connect('@UNIX@')"),
    _denied(
        "datagram_pair_to_host",
        "socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM)[0].sendto(b'x','@DGRAM@')",
    ),
    _denied(
        "datagram_pair_connects",
        "socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM)[0].connect('@DGRAM@')",
    ),
    _denied("stream_pair_connects", "socket.socketpair()[0].connect('@UNIX@')"),
    _denied("raw_pair", "socket.socketpair(socket.AF_UNIX,socket.SOCK_RAW)"),
    Case(
        "socketpair_ok",
        "import asyncio\nasync def m(): await asyncio.sleep(0); print('aok')\nasyncio.run(m())",
        "O=='aok\\n'",
    ),
]

FILES = [
    Case(
        "parent_environ",
        "import os\ntry: d=open(f'/proc/{os.getppid()}/environ').read(); print('@MARK@' in d)\n"
        "except OSError as e: print('denied',e.errno)",
        "'True' not in O and R==0",
    ),
    Case(
        "any_environ",
        "import os,glob\nhit=0\nfor p in glob.glob('/proc/[0-9]*/environ'):\n"
        "  try: hit+=('@MARK@' in open(p).read())\n  except OSError: pass\nprint('hits',hit)",
        "O=='hits 0\\n'",
    ),
    Case(
        "own_env",
        "import os; print(sorted(k for k in os.environ if 'SECRET' in k or 'TOKEN' in k), "
        "'@MARK@' in str(dict(os.environ)))",
        "O=='[] False\\n'",
    ),
    _denied("parent_mem", "open(f'/proc/{os.getppid()}/mem','rb')"),
    _denied("init_root", "os.listdir('/proc/1/root')"),
    Case(
        "ptrace_attach",
        LIBC + "import os\nr=l.ptrace(16,os.getppid(),0,0); print('r',r,ctypes.get_errno())",
        "O=='r -1 1\\n'",
    ),
    Case(
        "write_outside",
        "for p in ('/etc/x','/usr/x','/root/x','/home/x','/x','/var/tmp/x','/tmp/sbx_probe',"
        "'/dev/shm/../x','/proc/x'):\n  try: open(p,'w').write('x'); print('WROTE',p)\n"
        "  except OSError as e: pass\nprint('end')",
        "O=='end\\n'",
        levels=("L3", "L2"),
    ),
    _denied("read_shadow", "open('/etc/shadow').read()"),
    _denied("read_host_file", "open('@HOSTFILE@').read()", levels=("L3", "L2")),
    _denied("write_host_file", "open('@HOSTFILE@','a')"),
    _denied("chmod_host_file", "os.chmod('@HOSTFILE@',0o777)"),
    _denied("touch_host_file", "os.utime('@HOSTFILE@',(1,1))"),
    _denied("remove_host_file", "os.unlink('@HOSTFILE@')"),
    _denied("link_host_file", "os.link('@HOSTFILE@','mine')", levels=("L3", "L2")),
    _denied("list_home", "os.listdir('/home')", levels=("L3", "L2")),
    _denied("write_library", "open(os.__file__,'a')"),
    _denied("symlink_escape", "os.symlink('/etc','l'); open('l/x','w')"),
    Case(
        "symlink_output", "import os; os.symlink('@HOSTFILE@','out.txt'); print('ok')", "O=='ok\\n'"
    ),
    _denied("dotdot", "open('../'*9+'tmp/sbx_probe','w')", levels=("L3", "L2")),
    Case(
        "inherited_fds",
        "import os\nfds=[]\nfor f in range(3,1024):\n  try: os.fstat(f); fds.append(f)\n"
        "  except OSError: pass\nprint('fds',fds)",
        "O=='fds []\\n'",
    ),
    _denied("chroot", "os.chroot('/')"),
    _denied("setuid0", "os.setuid(0)"),
    _denied("mknod", "os.mknod('d',0o60666,os.makedev(7,0))"),
    _denied("raise_hostname", "open('/proc/sys/kernel/hostname','w').write('x')"),
    _denied("kmsg", "open('/dev/kmsg')"),
    Case(
        "mount",
        LIBC + "print(l.mount(b'x',b'/tmp',b'tmpfs',0,None),ctypes.get_errno())",
        "O=='-1 1\\n'",
    ),
    Case("userns_nested", LIBC + "print(l.unshare(0x10000000),ctypes.get_errno())", "O=='-1 1\\n'"),
    Case(
        "clone_namespace",
        LIBC + "print(l.syscall(56,0x10000011,0,0,0,0),ctypes.get_errno())",
        "O=='-1 1\\n'",
    ),
    Case(
        "setid_binary",
        "import subprocess; r=subprocess.run(['/bin/su','-c','id'],input=b'\\n',"
        "capture_output=True); print(r.returncode,r.stdout)",
        "b'uid=0'.decode() not in O",
    ),
    Case(
        "kernel_interfaces",
        LIBC + "for n in (321,425,250,298,323,101,310,175,29,68,240):\n"
        "  print(l.syscall(n,0,0,0,0,0),ctypes.get_errno())",
        "O=='-1 1\\n'*11",
    ),
    Case(
        "upper_half_of_argument",
        LIBC + "print(l.syscall(16,ctypes.c_long(0),ctypes.c_long((1<<32)|0x5412),b'x'),"
        "ctypes.get_errno())",
        "O=='-1 1\\n'",
    ),
    Case(
        "limits_of_others",
        "import resource,os\ntry: resource.prlimit(os.getppid(),resource.RLIMIT_NOFILE,(1,1)); "
        "print('SET')\nexcept OSError as e: print('denied')",
        "O=='denied\\n'",
    ),
    Case(
        "raise_rlimit",
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_AS,(-1,-1)); print('RAISED')\n"
        "except (ValueError,OSError) as e: print('denied')",
        "O=='denied\\n'",
    ),
    Case(
        "see_other_pids",
        "import os\ntry: print('few',len([p for p in os.listdir('/proc') if p.isdigit()])<4)\n"
        "except OSError as e: print('denied',e.errno)",
        "O=='few True\\n' if LEVEL=='L3' else O.startswith('denied')",
        levels=("L3", "L2"),
    ),
]
