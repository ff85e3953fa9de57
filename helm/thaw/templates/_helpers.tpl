{{- define "thaw.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough that the suffixes of all objects and the ordinals of pods fit into 63 characters. */}}
{{- define "thaw.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "thaw.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "thaw.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "thaw.selectorLabels" -}}
app.kubernetes.io/name: {{ include "thaw.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "thaw.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "thaw.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "thaw.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "thaw.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The name that clients and workers use, and that the coordinator's certificate carries. */}}
{{- define "thaw.host" -}}
{{ include "thaw.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "thaw.server" -}}
https://{{ include "thaw.host" . }}:{{ .Values.coordinator.port }}
{{- end -}}

{{- define "thaw.store" -}}
{{- $prefix := default (printf "%s/%s" .Release.Namespace (include "thaw.fullname" .)) .Values.etcd.prefix -}}
etcd{{ .Values.etcd.tls.enabled | ternary "+tls" "" }}://{{ join "," .Values.etcd.endpoints }}/{{ $prefix }}
{{- end -}}

{{/* What a coordinator shows to etcd: its environment, its mounts and their volumes. */}}
{{- define "thaw.etcdEnv" -}}
{{- with .Values.etcd }}
{{- if and .tls.enabled (not .tls.existingSecret) }}
{{- fail "etcd.tls.existingSecret: name the Secret with etcd's ca.crt" }}
{{- end }}
{{- if and .auth.user (not .auth.existingSecret) }}
{{- fail "etcd.auth.existingSecret: name the Secret with the password" }}
{{- end }}
{{- if .tls.enabled }}
- name: THAW_ETCD_CA
  value: /etc/thaw/etcd/ca.crt
{{- if .tls.clientCertificate }}
- name: THAW_ETCD_CERT
  value: /etc/thaw/etcd/tls.crt
- name: THAW_ETCD_KEY
  value: /etc/thaw/etcd/tls.key
{{- end }}
{{- end }}
{{- if .auth.user }}
- name: THAW_ETCD_USER
  value: {{ .auth.user | quote }}
- name: THAW_ETCD_PASSWORD_FILE
  value: /etc/thaw/etcd-user/password
{{- end }}
{{- end }}
{{- end -}}

{{- define "thaw.etcdMounts" -}}
{{- if .Values.etcd.tls.enabled }}
- name: etcd-tls
  mountPath: /etc/thaw/etcd
  readOnly: true
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: etcd-user
  mountPath: /etc/thaw/etcd-user
  readOnly: true
{{- end }}
{{- end -}}

{{- define "thaw.etcdVolumes" -}}
{{- if .Values.etcd.tls.enabled }}
- name: etcd-tls
  secret:
    secretName: {{ .Values.etcd.tls.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: etcd-user
  secret:
    secretName: {{ .Values.etcd.auth.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "thaw.claim" -}}
{{- if and .Values.storage.existingClaim .Values.storage.volume -}}
{{- fail "storage: give existingClaim or volume, not both" -}}
{{- end -}}
{{- default (printf "%s-storage" (include "thaw.fullname" .)) .Values.storage.existingClaim -}}
{{- end -}}

{{/* Whether the chart makes the certificates: "true" or empty. */}}
{{- define "thaw.makesCertificates" -}}
{{- $given := 0 -}}
{{- range $_, $name := .Values.tls.existingSecrets -}}
{{- if $name -}}{{- $given = add1 $given -}}{{- end -}}
{{- end -}}
{{- if not (has (int $given) (list 0 3)) -}}
{{- fail "tls.existingSecrets: give coordinator, worker and client, or none of them" -}}
{{- end -}}
{{- if eq (int $given) 0 -}}true{{- end -}}
{{- end -}}

{{/* The Secret of one role: (list $ "worker"). */}}
{{- define "thaw.tlsSecret" -}}
{{- $role := index . 1 -}}
{{- with index . 0 -}}
{{- default (printf "%s-%s-tls" (include "thaw.fullname" .) $role) (index .Values.tls.existingSecrets $role) -}}
{{- end -}}
{{- end -}}

{{/* (list $ .Values.image.worker "-cuda") */}}
{{- define "thaw.image" -}}
{{- $image := index . 1 -}}
{{ $image.repository }}:{{ default (printf "%s%s" (index . 0).Chart.AppVersion (index . 2)) $image.tag }}
{{- end -}}

{{- define "thaw.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "thaw.tlsEnv" -}}
- name: THAW_TLS_CA
  value: /etc/thaw/tls/ca.crt
- name: THAW_TLS_CERT
  value: /etc/thaw/tls/tls.crt
- name: THAW_TLS_KEY
  value: /etc/thaw/tls/tls.key
{{- end -}}

{{- define "thaw.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{ include "thaw.tlsEnv" . }}
- name: THAW_LOG
  value: {{ .Values.log | quote }}
- name: THAW_LOG_FORMAT
  value: {{ .Values.logFormat }}
{{- with .Values.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What the pods of both roles have in common: (list $ .Values.worker). */}}
{{- define "thaw.pod" -}}
{{- $role := index . 1 -}}
{{- with index . 0 -}}
serviceAccountName: {{ include "thaw.serviceAccountName" . }}
automountServiceAccountToken: false
# Variables for every Service of the namespace are of no use here.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $role.terminationGracePeriodSeconds }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
{{- with $role.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $role.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A client verb in the cluster: (list $ "health"). */}}
{{- define "thaw.testContainer" -}}
{{- $verb := index . 1 -}}
{{- with index . 0 -}}
- name: {{ $verb }}
  image: {{ include "thaw.image" (list . .Values.image.coordinator "") }}
  imagePullPolicy: {{ .Values.image.coordinator.pullPolicy }}
  args:
    - {{ $verb }}
    - --server={{ include "thaw.server" . }}
  env:
    {{- include "thaw.tlsEnv" . | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 64Mi}
    limits: {memory: 256Mi}
  securityContext:
    {{- include "thaw.containerSecurityContext" . | nindent 4 }}
  volumeMounts:
    - name: tls
      mountPath: /etc/thaw/tls
      readOnly: true
{{- end }}
{{- end -}}
