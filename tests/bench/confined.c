/* The confinement floor: the copy floor with the processes and the protections of imap-tls, and nothing of TLS. What a connection
   costs for being served by a process that can do no harm, before anything of ours is in it.
   A keeper that has read the key and answers three questions; a launcher that becomes the IMAP server; and the process that copies.
   Two of them enter what imap-tls enters, call by call (src/sandbox/mod.rs), with a filter that is shorter than either of its.
   With --listen ADDRESS:PORT in front it is the listener's floor: a process for each client without exec, and no keeper. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
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

static void empty_bounding_set(void)
{
	int capability;
	for (capability = 0; capability <= LAST_CAPABILITY; capability++)
		must(prctl(PR_CAPBSET_DROP, capability, 0, 0, 0));
}

/* Forks what becomes the IMAP server when it is told on `launch`. */
static pid_t launcher(int server[2], int launch[2], char **command)
{
	char octet;
	pid_t backend;
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
		execv(command[0], command);
		_exit(100);
	}
	close(server[1]);
	close(launch[1]);
	return backend;
}

/* In the sandbox: the IMAP server is started, and served to the client. */
static int attend(int client, int server, int launch, pid_t backend)
{
	char octet = 0;
	int status = 0;
	must(write(launch, &octet, 1));
	close(launch);
	if (copy(client, server) != 0)
		return 111;
	must(waitpid(backend, &status, 0));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 111;
}

static void serve(int client, const char *root, char **command)
{
	int server[2], launch[2];
	pid_t backend = launcher(server, launch, command);
	empty_bounding_set();
	enter(64001, root, (launch[0] > client ? launch[0] : client) + 1);
	_exit(attend(client, server[0], launch[0], backend));
}

static int listen_at(const char *address, const char *root, char **command)
{
	struct sockaddr_in place = { 0 };
	int one = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	place.sin_family = AF_INET;
	place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	place.sin_port = htons(atoi(strrchr(address, ':') + 1));
	must(listening);
	must(setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	must(bind(listening, (struct sockaddr *) &place, sizeof place));
	must(listen(listening, 4096));
	must(write(2, "listening on\n", 13));
	for (;;) {
		int client = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
		must(client);
		pid_t child = fork();
		must(child);
		if (child == 0) {
			close(listening);
			serve(client, root, command);
		}
		close(client);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

/* Key and root in front of the IMAP server's command. */
int main(int count, char **arguments)
{
	int server[2], launch[2], keeper[2], status = 0, questions;
	char octet = 0, key[4096];
	pid_t holder, backend;
	if (count > 5 && strcmp(arguments[1], "--listen") == 0)
		return listen_at(arguments[2], arguments[4], arguments + 5);
	if (count < 4)
		return 100;
	backend = launcher(server, launch, arguments + 3);
	empty_bounding_set();
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
	close(keeper[1]);
	enter(64001, arguments[2], (keeper[0] > launch[0] ? keeper[0] : launch[0]) + 1);
	for (questions = 0; questions < 3; questions++) {
		must(write(keeper[0], &octet, 1));
		must(read(keeper[0], &octet, 1));
	}
	close(keeper[0]);
	must(waitpid(holder, &status, 0));
	return attend(0, server[0], launch[0], backend);
}
