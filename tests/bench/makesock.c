/* The copy floor: what a connection costs with a process between client and IMAP server and no TLS, like the makesock of old.
   A socketpair, a fork, an exec, and bytes copied both ways to the end. */
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

struct way {
	int from, to, done;
	ssize_t start, end;
	char bytes[64 * 1024];
};

/* Zero pages until used. */
static struct way ways[2];

/* Moves what can be moved; at the end of `from`, half-closes `to`. */
static void move(struct way *way)
{
	if (way->start == way->end) {
		way->start = 0;
		way->end = recv(way->from, way->bytes, sizeof way->bytes, MSG_DONTWAIT);
		if (way->end < 0) {
			way->end = 0;
			return;
		}
		if (way->end == 0) {
			shutdown(way->to, SHUT_WR);
			way->done = 1;
			return;
		}
	}
	ssize_t sent = send(way->to, way->bytes + way->start, way->end - way->start, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent > 0)
		way->start += sent;
}

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
	ways[0].from = ways[1].to = 0;
	ways[0].to = ways[1].from = pair[0];
	/* When the backend has ended, what the client still says concerns nobody. */
	while (!ways[1].done) {
		struct pollfd wanted[2];
		int index;
		for (index = 0; index < 2; index++) {
			struct way *way = &ways[index];
			int is_full = way->start != way->end;
			wanted[index].fd = way->done ? -1 : is_full ? way->to : way->from;
			wanted[index].events = is_full ? POLLOUT : POLLIN;
		}
		if (poll(wanted, 2, -1) < 0)
			return 111;
		for (index = 0; index < 2; index++)
			if (wanted[index].revents && !ways[index].done)
				move(&ways[index]);
	}
	waitpid(backend, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 111;
}
