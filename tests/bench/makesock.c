/* The copy floor: what a connection costs with a process between client and IMAP server and no TLS, like the makesock of old.
   A socketpair, a fork, an exec, and bytes copied both ways to the end. */
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "copy.h"

int main(int count, char **arguments)
{
	int pair[2], status = 0;
	pid_t backend;
	if (count < 2 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		return 100;
	backend = fork();
	if (backend < 0)
		return 111;
	if (backend == 0) {
		dup2(pair[1], 0);
		dup2(pair[1], 1);
		execv(arguments[1], arguments + 1);
		_exit(100);
	}
	close(pair[1]);
	if (copy(0, pair[0]) != 0)
		return 111;
	waitpid(backend, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 111;
}
