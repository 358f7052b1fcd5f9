/* The confinement floor: the copy floor with the processes and the protections of imap-tls, and nothing of TLS. What a connection
   costs for being served by a process that can do no harm, before anything of ours is in it.
   A keeper that has read the key and answers three questions; a launcher that becomes the IMAP server; and the process that copies.
   Two of them enter what imap-tls enters, call by call (src/sandbox/mod.rs), with a filter that is shorter than either of its. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "copy.h"

/* Of the kernel's headers, which musl-gcc does not see. */
#define LANDLOCK_CREATE_RULESET 444
#define LANDLOCK_RESTRICT_SELF 446
#define CLOSE_RANGE 436
#define SET_MDWE 65
#define LAST_CAPABILITY 40
#define LOAD 0x20
#define JUMP_IF_EQUAL 0x15
#define RETURN 0x06
#define KILL 0x80000000U
#define PASS 0x7fff0000U
#if defined(__x86_64__)
#define ARCHITECTURE 0xc000003eU
#elif defined(__aarch64__)
#define ARCHITECTURE 0xc00000b7U
#elif defined(__riscv)
#define ARCHITECTURE 0xc00000f3U
#endif

struct instruction {
	uint16_t code;
	uint8_t if_equal, if_not;
	uint32_t value;
};

static void must(long result)
{
	if (result < 0)
		_exit(111);
}

static void filter(void)
{
#define ALLOW(name) { JUMP_IF_EQUAL, 0, 1, SYS_##name }, { RETURN, 0, 0, PASS }
	static struct instruction code[] = {
		{ LOAD, 0, 0, 4 },
		{ JUMP_IF_EQUAL, 1, 0, ARCHITECTURE },
		{ RETURN, 0, 0, KILL },
		{ LOAD, 0, 0, 0 },
		ALLOW(read), ALLOW(write), ALLOW(recvfrom), ALLOW(sendto), ALLOW(ppoll), ALLOW(shutdown), ALLOW(close), ALLOW(wait4),
#if defined(SYS_poll)
		ALLOW(poll),
#endif
		ALLOW(exit_group),
		{ RETURN, 0, 0, KILL },
	};
	struct { unsigned short length; struct instruction *code; } program = { sizeof code / sizeof *code, code };
	must(syscall(SYS_seccomp, 1, 0, &program));
}

static void limit(int what, rlim_t most)
{
	struct rlimit both = { most, most };
	must(setrlimit(what, &both));
}

/* What a kernel lacks of Landlock and MDWE is left out, as imap-tls does. */
static void deny(void)
{
	static const uint64_t filesystem[] = { 0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff, 0xffff };
	struct { uint64_t filesystem, network, scope; } handled = { 0, 0, 0 };
	long abi = syscall(LANDLOCK_CREATE_RULESET, NULL, 0, 1), ruleset;
	if (abi < 1)
		return;
	handled.filesystem = filesystem[abi < 6 ? abi : 6];
	handled.network = abi >= 4 ? 3 : 0;
	handled.scope = abi >= 6 ? 3 : 0;
	ruleset = syscall(LANDLOCK_CREATE_RULESET, &handled, abi >= 6 ? 24 : abi >= 4 ? 16 : 8, 0);
	must(ruleset);
	must(syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0));
	close(ruleset);
}

static void enter(id_t id, const char *root, unsigned int least)
{
	struct { uint32_t version; int pid; } header = { 0x20080522, 0 };
	uint32_t none[6] = { 0 };
	must(chdir(root));
	must(chroot("."));
	must(chdir("/"));
	must(setgroups(0, NULL));
	must(setresgid(id, id, id));
	must(setresuid(id, id, id));
	must(syscall(SYS_capset, &header, none));
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	deny();
	syscall(CLOSE_RANGE, least, ~0U, 0);
	limit(RLIMIT_AS, 32 << 20);
	limit(RLIMIT_CORE, 0);
	limit(RLIMIT_NOFILE, 8);
	limit(RLIMIT_NPROC, 0);
	limit(RLIMIT_MEMLOCK, 0);
	limit(RLIMIT_MSGQUEUE, 0);
	limit(RLIMIT_FSIZE, 0);
	must(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
	prctl(SET_MDWE, 1, 0, 0, 0);
	filter();
}

/* Key and root in front of the IMAP server's command. */
int main(int count, char **arguments)
{
	int server[2], launch[2], keeper[2], status = 0, capability, questions;
	char octet = 0, key[4096];
	pid_t holder, backend;
	if (count < 4)
		return 100;
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, server));
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, launch));
	backend = fork();
	must(backend);
	if (backend == 0) {
		close(launch[0]);
		if (read(launch[1], &octet, 1) != 1)
			_exit(0);
		dup2(server[1], 0);
		dup2(server[1], 1);
		execv(arguments[3], arguments + 3);
		_exit(100);
	}
	for (capability = 0; capability <= LAST_CAPABILITY; capability++)
		must(prctl(PR_CAPBSET_DROP, capability, 0, 0, 0));
	/* The launcher must not have it, or the keeper would see no end. */
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, keeper));
	holder = fork();
	must(holder);
	if (holder == 0) {
		int file = open(arguments[1], O_RDONLY | O_CLOEXEC);
		must(file);
		must(read(file, key, sizeof key));
		/* In the place of the first: all beyond are closed. */
		dup2(keeper[1], server[0]);
		enter(64002, arguments[2], server[0] + 1);
		while (read(server[0], &octet, 1) == 1)
			must(write(server[0], &octet, 1));
		_exit(0);
	}
	close(server[1]);
	close(launch[1]);
	close(keeper[1]);
	enter(64001, arguments[2], (keeper[0] > launch[0] ? keeper[0] : launch[0]) + 1);
	for (questions = 0; questions < 3; questions++) {
		must(write(keeper[0], &octet, 1));
		must(read(keeper[0], &octet, 1));
	}
	close(keeper[0]);
	must(waitpid(holder, &status, 0));
	must(write(launch[0], &octet, 1));
	close(launch[0]);
	if (copy(0, server[0]) != 0)
		return 111;
	must(waitpid(backend, &status, 0));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 111;
}
