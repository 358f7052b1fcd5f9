/* Bytes copied both ways between a client and an IMAP server, to the end. */
#include <poll.h>
#include <sys/socket.h>

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

/* 0 when the server has ended; what the client still says then concerns nobody. */
static int copy(int client, int server)
{
	ways[0].from = ways[1].to = client;
	ways[0].to = ways[1].from = server;
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
			return -1;
		for (index = 0; index < 2; index++)
			if (wanted[index].revents && !ways[index].done)
				move(&ways[index]);
	}
	return 0;
}
